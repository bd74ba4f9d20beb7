//! Journals: what each side may do after a crash.
