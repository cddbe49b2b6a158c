"""Frames on disk with their manifest, and long measurements that go on where they stopped."""
