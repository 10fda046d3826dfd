"""Results as one page each: HTML with its figures inside, that needs no network, prints, and follows light or dark."""
