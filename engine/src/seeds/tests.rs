//! What is read of seeds is found again with its contents, whatever the files look like and become.

use std::io::{Seek, SeekFrom, Write};
use std::sync::Mutex;

use hybridmig_transport::codec::SeedNames;
use proptest::prelude::*;

use super::*;

const SIZE: usize = 4096;

/// Contents that no other number has.
fn block(number: u32) -> Vec<u8> {
    let mut state = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..SIZE / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

fn name(data: &[u8]) -> [u8; 32] {
    *blake3::hash(data).as_bytes()
}

fn quiet(_: SeedProgress) {}

fn read(paths: &[&Path]) -> Result<Seeds, SeedError> {
    let paths: Vec<PathBuf> = paths.iter().map(|path| (*path).to_owned()).collect();
    Seeds::read(&paths, SIZE as u32, &quiet)
}

fn has(seeds: &Seeds, data: &[u8]) -> bool {
    let mut copy = vec![1; data.len()];
    seeds.copy(&name(data), &mut copy) && copy == data
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Every block of every file is found with its contents, holes and odd ends included.
    #[test]
    fn all_that_the_files_hold_is_found(
        files in prop::collection::vec(
            (prop::collection::vec(prop_oneof![2 => (1_u32..40).prop_map(Some), 1 => Just(None)], 0..700), 0..SIZE),
            1..4,
        ),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        let mut held: Vec<Vec<u8>> = Vec::new();
        for (number, (blocks, end)) in files.iter().enumerate() {
            let path = directory.path().join(format!("seed-{number}"));
            let mut file = File::create(&path).unwrap();
            for content in blocks {
                match content {
                    Some(content) => {
                        file.write_all(&block(*content)).unwrap();
                        held.push(block(*content));
                    }
                    None => _ = file.seek(SeekFrom::Current(SIZE as i64)).unwrap(),
                }
            }
            let at = file.stream_position().unwrap();
            file.set_len(at).unwrap();
            if *end > 0 {
                let mut last = block(1000 + number as u32);
                last[*end..].fill(0);
                file.write_all(&last[..*end]).unwrap();
                held.push(last);
            }
            paths.push(path);
        }
        let seen = Mutex::new(Vec::new());
        let seeds = Seeds::read(&paths, SIZE as u32, &|progress| seen.lock().unwrap().push(progress)).unwrap();
        prop_assert!(!seeds.cut_off());
        for data in &held {
            prop_assert!(has(&seeds, data));
        }
        prop_assert!(!has(&seeds, &block(5000)));
        prop_assert!(!has(&seeds, &vec![0; SIZE]));
        held.sort();
        held.dedup();
        prop_assert_eq!(seeds.len(), held.len());
        for progress in seen.into_inner().unwrap() {
            prop_assert!(progress.read <= progress.total);
        }
        // The source learns all of it.
        let names = SeedNames::default();
        for piece in seeds.pieces() {
            let Message::Seeds { block_size, names: piece } = piece else { panic!("{piece:?}") };
            names.learn(block_size, piece).unwrap();
        }
        prop_assert_eq!(names.len(), held.len());
    }
}

#[test]
fn a_hole_costs_no_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sparse");
    let mut file = File::create(&path).unwrap();
    file.set_len(8 << 40).unwrap();
    file.seek(SeekFrom::Start(5 << 40)).unwrap();
    file.write_all(&block(1)).unwrap();
    let seeds = read(&[&path]).unwrap();
    assert_eq!(seeds.len(), 1);
    assert!(has(&seeds, &block(1)));
}

#[test]
fn a_file_that_changed_is_a_miss_or_known_by_its_hash() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("seed");
    std::fs::write(&path, [block(1), block(2), block(3)].concat()).unwrap();
    let seeds = read(&[&path]).unwrap();
    assert!(seeds.changed().is_empty());
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&block(9), SIZE as u64).unwrap();
    let mut copy = vec![0; SIZE];
    // What is copied is not what was asked for: the caller sees it by the hash.
    assert!(seeds.copy(&name(&block(2)), &mut copy) && copy == block(9));
    assert!(has(&seeds, &block(1)));
    file.set_len(2 * SIZE as u64 + 7).unwrap();
    assert!(!seeds.copy(&name(&block(3)), &mut copy), "it is cut off");
    assert!(has(&seeds, &block(1)));
    assert_eq!(seeds.changed(), [path.as_path()]);
}

#[test]
fn more_than_the_most_is_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("seed");
    let blocks: Vec<u8> = (1..=40).flat_map(block).collect();
    std::fs::write(&path, blocks).unwrap();
    let paths = [path];
    for (most, cut_off) in [(39, true), (40, false)] {
        let seeds = super::read::read(&paths, SIZE as u32, most, &quiet).unwrap();
        assert_eq!((seeds.len(), seeds.cut_off()), (most, cut_off));
    }
}

#[test]
fn what_the_guest_is_written_to_is_no_seed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::write(&path, block(1)).unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let seeds = read(&[&link]).unwrap();
    let text = seeds.conflict(&path).expect("the same file");
    assert!(text.contains("disk.img") && text.contains("mv "), "{text}");
    let other = directory.path().join("other.img");
    assert!(seeds.conflict(&other).is_none());
    std::fs::write(&other, block(1)).unwrap();
    assert!(seeds.conflict(&other).is_none());
}

#[test]
fn what_cannot_be_a_seed_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let error = read(&[&missing]).unwrap_err();
    assert!(matches!(error, SeedError::Open { .. }), "{error}");
    assert!(error.to_string().contains("missing"), "{error}");
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [directory.path(), &pipe, Path::new("/dev/null")] {
        let error = read(&[path]).unwrap_err();
        assert!(matches!(error, SeedError::Kind { .. }), "{error}");
    }
    let empty = directory.path().join("empty");
    std::fs::write(&empty, []).unwrap();
    assert!(read(&[&empty]).unwrap().is_empty());
    assert!(read(&[]).unwrap().is_empty());
}

#[test]
fn another_length_than_that_of_its_blocks_is_not_copied() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("seed");
    std::fs::write(&path, block(1)).unwrap();
    let seeds = read(&[&path]).unwrap();
    assert!(!seeds.copy(&name(&block(1)), &mut vec![0; 2 * SIZE]));
}
