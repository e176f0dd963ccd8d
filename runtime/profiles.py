"""Names of what one may switch on, and profiles: names for what one would type after the name of the program."""

PARTS = {  # optional parts of the model, switched on by naming them in `parts`
    "reset": "nothing is carried across a document's start",
    "unet": "the second half of the layers adds what the first half stored",
    "smear": "each embedding takes a gated share of the one before it",
    "null": "attention: a learned null key and value per head",
    "xsa": "attention: the output loses its projection on the token's own value",
    "gate": "attention: a sparse output gate per head",
    "vres": "attention: values mix with those of the first attention layer",
    "capped": "attention: scores have a limit, by tanh",
    "spectral": "capsules: the causal Walsh filter bank on their input",
    "static": "capsules: decays that do not depend on the token (ablation)",
    "uncoupled": "recurrences and capsules are read without a coupling of low rank (ablation)",
    "qat": "matrices and embeddings train on the grid of the codec they ship in",
    "cautious": "weights decay only where the update shrinks them as well",
    "even": "the weight average is of the last `ema` of the run, in which all weights count the same",
    "fill": "embeddings ship in finer or coarser steps than they train in, so that the file fills the cap",
    "dropout": "training: every tenth number is zero, of embeddings and of what mixers and MLPs say",
    "answers": "training: the loss is of what an assistant says alone",
    "easy": "training: from the easiest quarter of the text to all of it, by half-time: no gain seen",
    "replay": "training: every eighth window is one of the hardest that were met: no gain seen",
    "surprise": "training: what surprises weighs more: no gain seen",
    "salience": "training: what is rare weighs more: no gain seen",
    "poly": "memory: keys and queries with their squares",
    "closing": "memory: its gate may close, where else a tenth stays open (ablation)",
    "untied": "the head has a matrix of its own",
    "plain": "the least code: no fused loss, no buckets of gradients, no entropy coder but brotli's",
    "counts": "the file holds n-gram counts of the training text, in the bytes that the network leaves",
    "carry": "training follows lanes of consecutive windows and carries their detached state",
}

SMALL = """
    dim=128 heads=2 kv_heads=1 mlp_mult=3 seq_len=512 batch_tokens=4096 micro_tokens=4096 max_seconds=120
    decay=0.3 z_loss=0.0001 softcap=15 eval_modes=chunked,stream eval_lanes=1 matrix_lr=0.015 embed_lr=0.01
"""  # a system of the family, beside attention alone: layers=AAAA

PROFILES = {
    "default": "",
    "tiny": """
        layers=AKS dim=64 heads=4 kv_heads=2 vocab=64 mlp_mult=2 rope_dims=8 slots=4 group=32 seq_len=32
        batch_tokens=256 micro_tokens=256 max_steps=8 max_seconds=0 log_every=2 eval_lanes=2 eval_stride=8
        dtype=float32 eval_modes=chunked,stream data=datasets/tiny
    """,
    "local": """
        layers=AKSK parts=reset,unet,smear,null,spectral,qat,counts dim=128 heads=2 kv_heads=1 mlp_mult=3 seq_len=512
        batch_tokens=4096 micro_tokens=4096 max_seconds=120 reserve_seconds=34 decay=0.3 z_loss=0.0001 softcap=15
        eval_modes=chunked,stream,counts eval_lanes=1 code_bytes=56000 matrix_lr=0.015 embed_lr=0.01
    """,
    "baseline": """
        layers=AAAAAAAAA parts=unet,plain dim=512 heads=8 kv_heads=4 vocab=1024 mlp_mult=2 activation=relu2
        conv_taps=0 rope_dims=64 weight_codec=int8 embed_codec=int8 matrix_lr=0.04 embed_lr=0.05 scalar_lr=0.04
        gate_lr=0.04 decay=0.1 seq_len=1024 batch_tokens=524288 micro_tokens=65536 max_seconds=600
        eval_modes=sliding eval_lanes=512 eval_batch=64 data=datasets/sp1024
    """,
    "skc_competition": """
        layers=AKAAKAASAAA parts=reset,unet,smear,null,xsa,gate,spectral,qat,fill dim=768 heads=12 kv_heads=4
        vocab=8192 embed_rank=384 mix_rank=16 softcap=10 z_loss=0.0001 seq_len=2048 window=1024
        batch_tokens=524288 micro_tokens=65536 max_seconds=600 reserve_seconds=8 eval_modes=stream,all eval_lanes=512
        eval_batch=64 data=datasets/sp8192
    """,
    "frontier": """
        layers=AAAAAAAAAAA parts=reset,unet,smear,null,xsa,gate dim=512 heads=8 kv_heads=4 vocab=8192 conv_taps=0
        streams=2 parallel_from=8 loop=3,5,3 weight_codec=int6 embed_codec=int7 matrix_lr=0.026 embed_lr=0.03
        scalar_lr=0.02 weight_decay=0.095 decay=0.85 lr_floor=0.1 clip_norm=0.3 ema=0.06 reserve_seconds=8
        seq_len=2048 batch_tokens=786432 micro_tokens=98304 max_seconds=600 eval_modes=sliding
        eval_lanes=512 eval_batch=64 data=datasets/sp8192
    """,
    "chat": """
        layers=AAAAAA parts=reset,capped,dropout,answers,qat dim=256 heads=8 kv_heads=8 vocab=4000 conv_taps=0
        seq_len=256 batch_tokens=4096 micro_tokens=4096 max_seconds=170 decay=0.5 rope_dims=32 eval_modes=stream
        eval_lanes=1 matrix_lr=0.02 embed_lr=0.01 data=datasets/chat
    """,
    "engram_brain": """
        layers=AAAA parts=reset,null,qat,easy,replay,surprise,salience dim=96 heads=4 kv_heads=4 mlp_mult=4 group=32
        rope_dims=24 window=32 seq_len=128 engram_layers=0 engram_orders=2,3 engram_heads=1 engram_rows=50021
        feedback_passes=2 halt=0.05 batch_tokens=4096 micro_tokens=4096 max_seconds=120 decay=0.3 eval_modes=stream
        eval_lanes=1 matrix_lr=0.015 embed_lr=0.01
    """,
    "engram_brain_large": """
        layers=AAAAAAAA parts=reset,null,qat,easy,replay,surprise,salience dim=256 heads=8 kv_heads=8 mlp_mult=4
        window=32 seq_len=128 engram_layers=0 engram_orders=2,3 engram_heads=1 engram_rows=50021 feedback_passes=2
        halt=0.05 batch_tokens=8192 micro_tokens=4096 max_seconds=600 decay=0.3 eval_modes=stream eval_lanes=1
        matrix_lr=0.015 embed_lr=0.01
    """,
    "wavefield": "layers=WAWA parts=reset,unet,smear,null,qat" + SMALL,
    "atlas": "layers=AMAM parts=reset,unet,smear,null,qat,poly memory_chunks=0:64,0.5:32" + SMALL,
    "engram_code": "parts=reset,unet,smear,null,qat engram_layers=0,3 engram_orders=2,3 engram_rows=16384" + SMALL,
}
