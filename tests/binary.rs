//! That the whole-system tests find the very program that cargo has built. A test of the root package,
//! because cargo builds a program for the tests of its own package, and so, in a workspace-wide
//! run, in time for all others.

use std::path::Path;

#[test]
fn fixtures_run_the_program_just_built() {
    let built = Path::new(env!("CARGO_BIN_EXE_hybridmig")).canonicalize();
    let found = hybridmig_tests::hybridmig_binary().and_then(|path| Ok(path.canonicalize()?));
    assert_eq!(found.unwrap(), built.unwrap());
}
