//! Restoration agility: lost work, PRA and T95 from samples of guest speed.
