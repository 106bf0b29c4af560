"""Serve a policy to a robot over LeRobot's asynchronous protocol, geometry online."""
