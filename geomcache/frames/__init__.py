"""The pictures of a LeRobotDataset."""
