"""Model, optimizer and learning rate schedule, built from the config with timm."""
