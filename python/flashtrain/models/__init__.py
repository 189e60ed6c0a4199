"""Models built from `flashtrain.modules`."""
