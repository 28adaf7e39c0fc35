"""Sources of images, tasks, masks and the order in which samples are seen."""
