"""What the tests of several packages share. Needs torch and pytest; nothing imports it but tests."""
