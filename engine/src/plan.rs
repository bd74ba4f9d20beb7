//! Which blocks move when: heat, rounds, the freeze set, the order of pushing.
