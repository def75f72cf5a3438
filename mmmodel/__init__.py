"""A lean text + image + audio model on packed batches, its data and its training; kernels come from mmkernels."""
