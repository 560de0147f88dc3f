"""What trials and contenders are called where they are measured, and where they are judged."""

import os

CORES = len(os.sched_getaffinity(0))

PRODUCTS, COPIES = "Ceilings: products of matrices", "Ceilings: copies"

STAGES = "preconv: stages alone"
DECODING = f"photos to normalised batches, {CORES} threads"
LARGE = "photos of 2 to 12 megapixels to normalised batches on the device"
RESIDENT = "preconv: batches on the device, bf16, against PyTorch tuned by hand"
WHOLE = "preconv: photos to features in memory, bf16, against PyTorch tuned by hand"
CLOSENESS = "preconv: distance to the CPU's float32 features"
JOB = "preconv: photos to stored features"
PRECONV = "cnnrs.preconv"

EAGER, FUSED, COMPILED = "the tutorial's loop", "no waiting, fused=True", "no waiting, fused=True, compiled"
GRAPHS = "no waiting, fused=True, compiled with mode='reduce-overhead'"
CALLED, FIT, HALF = "cnnrs.fit, engine='python'", "cnnrs.fit", "cnnrs.fit, amp='bf16', channels_last"
GATHERED = "rows on the device, gathered there; no waiting, fused=True"
ROWS = "cnnrs.fit, rows on the device"
LOADED = "fit with loading: head of VGG16"
MNIST, CATDOG, HEAD = "fit: MnistNet", "fit: CatDogNet", "fit: head of VGG16"
