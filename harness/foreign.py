"""Variables of the environment that other trainers of this contest read, and the field that stands for each here.

A name that is a field's own, as MATRIX_LR, is read; these are not, and whoever brings an old launcher should be told.
"""

import dataclasses

from train_gpt import Config

WORDS = {  # what stands for them: the variables, or how they begin
    "layers, a letter each": "NUM_LAYERS ARCHITECTURE SKC_RECURRENT_CORE SKC_UPPER_BRANCH",
    "dim": "MODEL_DIM",
    "heads": "NUM_HEADS",
    "kv_heads": "NUM_KV_HEADS",
    "vocab": "VOCAB_SIZE",
    "embed_rank": "EMBED_DIM",
    "softcap": "LOGIT_SOFTCAP",
    "rope_dims": "PARTIAL_ROPE_DIMS",
    "slots": "SKC_NUM_CAPSULES CAPSULE_NUM",
    "conv_taps": "SKC_CONV_KERNEL KOOPMAN_CONV_KERNEL",
    "state": "KOOPMAN_STATE_DIM",
    "mix_rank": "KOOPMAN_MIXER_RANK",
    "streams=2 and parallel_from": "SKC_PARALLEL_RESIDUAL",
    "loop, its first and last layer and its passes": "RECURRENCE_ TRAINING_DEPTH_RECURRENCE EVAL_DEPTH_RECURRENCE",
    "loop_start": "RECURRENCE_START_FRACTION",
    "experts, how many there are and how many a token uses": "MOE_",
    "moe_start": "MOE_START_FRACTION",
    "feedback_passes": "FEEDBACK_ EVAL_FEEDBACK_PASSES",
    "halt": "ADAPTIVE_HALT_",
    "parts, which may hold vres": "VRL_",
    "parts, which may hold xsa": "XSA_",
    "parts, which may hold qat": "TERNARY_QAT EXPORT_ALIGNED_TRAIN",
    "parts, which may hold untied": "TIE_EMBEDDINGS UNTIE_AT_FRACTION",
    "engram_layers": "BIGRAM_HASH_ENABLED ENGRAM_INJECT_LAYER ENGRAM_COMPETITION_ENABLED",
    "engram_rows": "BIGRAM_HASH_BUCKETS",
    "engram_width": "BIGRAM_HASH_DIM",
    "engram_heads": "ENGRAM_NUM_HEADS",
    "engram_orders": "ENGRAM_NUM_ORDERS",
    "engram_keep": "ENGRAM_EXPORT_",
    "group": "BITNET_GROUP_SIZE",
    "weight_codec": "EXPORT_MODE",
    "embed_codec": "FP_STORAGE",
    "rule": "TERNARY_THRESHOLD_ TERNARY_SCALE_",
    "rounding": "GPTQ_",
    "clip": "TERNARY_CLIP_ TERNARY_EMBED_CLIP_",
    "optimizers, that of the matrices first": "MATRIX_OPTIMIZER",
    "embed_lr": "TIED_EMBED_LR HEAD_LR ENGRAM_LR",
    "weight_decay": "MUON_WD ADAM_WD",
    "warmup, a share of the run": "WARMUP_STEPS WARMUP_FRACTION",
    "decay, a share of the run": "WARMDOWN_FRACTION WARMDOWN_ITERS",
    "momentum": "MUON_MOMENTUM",
    "momentum_warmup, a share of the run": "MUON_MOMENTUM_WARMUP_",
    "clip_norm": "GRAD_CLIP_NORM",
    "ema, its memory as a share of the run": "EMA_",
    "data": "DATA_PATH TOKENIZER_PATH",
    "seq_len": "TRAIN_SEQ_LEN",
    "seq_schedule": "SEQ_LEN_START SEQ_SCHEDULE_FRACTION CURRICULUM_",
    "batch_tokens": "TRAIN_BATCH_TOKENS",
    "batch_schedule": "BATCH_TOKENS_START BATCH_SCHEDULE_FRACTION",
    "micro_tokens, what one pass reads of batch_tokens": "GRAD_ACCUM_STEPS",
    "max_steps": "ITERATIONS",
    "max_seconds": "MAX_WALLCLOCK_SECONDS",
    "reserve_seconds": "EXPORT_GRACE_SECONDS",
    "val_every": "VAL_LOSS_EVERY",
    "val_tokens": "VAL_MAX_TOKENS FAST_SMOKE",
    "log_every": "TRAIN_LOG_EVERY",
    "eval_modes, which may hold sliding": "SLIDING_",
    "eval_stride": "SLIDING_EVAL_STRIDE",
    "eval_modes, which may hold engram": "EVAL_ENGRAM_ NGRAM_",
    "eval_modes, which may hold ttt or all": "TTT_",
    "nothing: on CUDA a step is always compiled": "COMPILE_MODE COMPILE_TARGET",
    "nothing: run_scripts/compare_codecs.py measures the rotation": "TURBO_QUANT_EXPORT TURBO_QUANT_TRAIN",
    "nothing: records/LOG.md says why": "TURBO_QUANT_KV KOOPMAN_SPECULATOR_ KOOPMAN_CONSISTENCY_ SOFTCAP_TYPE "
    "ROPE_TYPE YARN_ SELF_DISTILL_ STOCHASTIC_DEPTH LAWA_ EXPORT_PROXY_ TERNARY_CALIB_ CALIB_",
}
STANDS_FOR = {start: words for words, starts in WORDS.items() for start in starts.split()}


def strangers(env: dict[str, str]) -> dict[str, str]:
    """Variables of `env` that nothing here reads, and what stands for each; the longest beginning decides."""
    own = {field.name.upper() for field in dataclasses.fields(Config)}
    starts = {name: [s for s in STANDS_FOR if name == s or (s.endswith("_") and name.startswith(s))] for name in env}
    return {name: STANDS_FOR[max(fit, key=len)] for name, fit in sorted(starts.items()) if fit and name not in own}
