// Answers what autograd and the tracer ask of a CUDA device, for one that is not there. Kernels never run on it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kFirst{c10::DeviceType::CUDA, 0};
const c10::Stream kDefault{c10::Stream::DEFAULT, kFirst};

struct NoDevice final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kFirst; }
  c10::Device getDevice() const override { return kFirst; }
  c10::Stream getStream(c10::Device) const noexcept override { return kDefault; }
  c10::Stream getNewStream(c10::Device, int) const override { return kDefault; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kDefault; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

}  // namespace

namespace c10 {
C10_REGISTER_GUARD_IMPL(CUDA, NoDevice)
}

namespace at {

struct CUDAHooks : CUDAHooksInterface {  // registered by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
