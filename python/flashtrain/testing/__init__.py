"""What the tests of several packages share; needs torch and pytest."""
