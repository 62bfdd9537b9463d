"""The network, its optimizer and its schedule: timm's, from the config."""
