"""Stage two: LeRobot's trainer on items that carry cached geometry."""
