"""What is known of architectures: names and renames, fused parts, experts, orientation, ties, pairing."""
