"""A tool that selects clips for training by what can be measured of them."""
