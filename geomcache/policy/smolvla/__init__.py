"""The LeRobot policy plugin `smolvla_geometry`: SmolVLA with geometry."""
