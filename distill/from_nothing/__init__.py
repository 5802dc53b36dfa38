"""Models trained from nothing: the stages that digits and emoji share."""
