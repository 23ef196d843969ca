"""What Ray Serve itself starts: the application builder for `serve run` and a RayService."""
