"""How good samples are: FID, KID, IS, CA, PD, LPIPS, PSNR, SSIM, MAE, diversity, precision, recall.

Takes plain arguments and knows no network of ours; nothing is ever downloaded. Pictures are uint8
[N, 3, H, W] everywhere here, so that samples in memory and the files they are saved as have the
same scores. :mod:`palette.metrics.scorer` collects all of it, :mod:`palette.metrics.folders` scores
two folders, :mod:`palette.metrics.scores` is what comes out.
"""
