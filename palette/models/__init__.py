"""Networks: the guided-diffusion U-Net, the SR3 U-Net and their layers."""
