"""What argues about the method: more networks, arms and reports. The method does without them."""
