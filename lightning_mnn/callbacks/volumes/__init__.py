"""What the AngularVolumeMonitor measures."""
