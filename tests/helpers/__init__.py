"""What several tests share: small models and runs, fuzzed bytes, and programs to compare with."""
