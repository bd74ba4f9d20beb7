//! The embedded guest: a process with memory that it verifies, an access pattern and a speed.
