"""LIBERO, its variants as environments of LeRobot, and true geometry."""
