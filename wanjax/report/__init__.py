"""What full-size programs take of devices that are not there."""
