"""The LeRobot policy plugin `pi0_geometry`: Pi0 with geometry."""
