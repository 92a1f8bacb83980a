"""What a run tells about itself: metrics, events, guards, sign of life."""
