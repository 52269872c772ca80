"""The volumes that the AngularVolumeMonitor measures."""
