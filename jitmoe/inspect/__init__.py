"""Looks into calls: traces, checks, captures, replays and judges them."""
