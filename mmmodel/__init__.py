"""A lean text + image + audio model on packed batches, its data and its training; kernels come from mmkernels.

    mmmodel pretrain --preset quick --out runs/quick

configs                           PretrainConfig and its presets: demo(), stamps(), quick(), base(), ...
train.pretrain                    a run from a configuration
evaluate.evaluate                 its retrieval on concepts it never saw
finetuning.run.finetune           a run with labels, from a pretrained one
finetuning.predict.Predictor      what a fine-tuned model says of samples
embed.Embedder, embed.embed_one   vectors
export.from_pretrained            a run read back, to use in PyTorch
data.shards, data.loader          tar shards written and read
"""
