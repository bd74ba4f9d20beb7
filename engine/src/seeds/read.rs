//! Reads seeds, once: data only, a piece at a time on every core.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;

use hybridmig_transport::codec::seed_name;
use rustix::fs::{OFlags, SeekFrom, seek};
use rustix::io::Errno;

use super::{Entry, Identity, Seed, SeedError, SeedProgress, Seeds};

/// Bytes that a thread reads at once: long enough for a disk to be read at its speed.
const PIECE: u64 = 1 << 20;

/// Reads these files, `most` blocks of them.
pub(super) fn read(
    paths: &[PathBuf],
    block_size: u32,
    most: usize,
    progress: &(dyn Fn(SeedProgress) + Sync),
) -> Result<Seeds, SeedError> {
    let mut seeds = Vec::new();
    let mut blocks = 0;
    for path in paths {
        let seed = open(path.clone(), blocks)?;
        let end = u64::from(blocks) + seed.len.div_ceil(u64::from(block_size));
        blocks = u32::try_from(end).map_err(|_| SeedError::TooLong(block_size))?;
        seeds.push(seed);
    }
    let reader = Reader {
        seeds: &seeds,
        block_size: u64::from(block_size),
        total: seeds.iter().map(|seed| seed.len).sum(),
        most,
        progress,
        cursor: Mutex::new(Cursor::default()),
        // Address space only, until there is something to put there: growing would copy.
        found: Mutex::new(Vec::with_capacity(most.min(blocks as usize))),
    };
    reader.run()?;
    let cut_off = reader.cursor.into_inner().expect("not poisoned").cut_off;
    let mut entries = reader.found.into_inner().expect("not poisoned");
    entries.sort_unstable_by_key(|entry| (entry.name, entry.at));
    entries.dedup_by_key(|entry| entry.name);
    entries.shrink_to_fit();
    Ok(Seeds {
        block_size,
        files: seeds,
        entries,
        cut_off,
    })
}

fn open(path: PathBuf, first: u32) -> Result<Seed, SeedError> {
    let failed = |source| SeedError::Open {
        path: path.clone(),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        // Nobody may ever write to a pipe that was named by mistake.
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(&path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let kind = metadata.file_type();
    let len = if kind.is_file() {
        metadata.len()
    } else if kind.is_block_device() {
        seek(&file, SeekFrom::End(0)).map_err(|error| failed(error.into()))?
    } else {
        return Err(SeedError::Kind { path });
    };
    Ok(Seed {
        identity: Identity::of(&metadata),
        written: (metadata.mtime(), metadata.mtime_nsec()),
        path,
        file,
        len,
        first,
    })
}

/// What the reading threads share.
struct Reader<'a> {
    seeds: &'a [Seed],
    block_size: u64,
    total: u64,
    most: usize,
    progress: &'a (dyn Fn(SeedProgress) + Sync),
    cursor: Mutex<Cursor>,
    found: Mutex<Vec<Entry>>,
}

/// The piece that is next.
#[derive(Default)]
struct Cursor {
    seed: usize,
    offset: u64,
    /// Length of the seeds before this one.
    before: u64,
    /// There are more blocks than may be kept.
    cut_off: bool,
    /// A thread has failed.
    failed: bool,
}

/// A part of a seed, from the beginning of a block on.
struct Piece {
    seed: usize,
    offset: u64,
    len: u64,
}

impl Reader<'_> {
    fn run(&self) -> Result<(), SeedError> {
        let threads = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        thread::scope(|scope| {
            let mut readers = Vec::new();
            for number in 0..threads {
                let name = format!("seeds-{number}");
                let thread = thread::Builder::new().name(name);
                match thread.spawn_scoped(scope, || self.work()) {
                    Ok(reader) => readers.push(reader),
                    // One is enough; more are faster.
                    Err(error) if readers.is_empty() => return Err(SeedError::Thread(error)),
                    Err(error) => tracing::warn!("reading seeds on {number} threads: {error}"),
                }
            }
            for reader in readers {
                reader.join().expect("a thread that reads does not panic")?;
            }
            Ok(())
        })
    }

    /// Reads piece after piece, until there is none.
    fn work(&self) -> Result<(), SeedError> {
        let mut buffer = vec![0; PIECE.max(self.block_size) as usize];
        while let Some(piece) = self.next() {
            let entries = self.names(&piece, &mut buffer);
            if entries.is_err() {
                self.cursor.lock().expect("not poisoned").failed = true;
            }
            let entries = entries?;
            let mut found = self.found.lock().expect("not poisoned");
            let room = self.most - found.len();
            found.extend(entries.iter().take(room));
            drop(found);
            if entries.len() > room {
                self.cursor.lock().expect("not poisoned").cut_off = true;
            }
        }
        Ok(())
    }

    fn next(&self) -> Option<Piece> {
        let mut cursor = self.cursor.lock().expect("not poisoned");
        if cursor.cut_off || cursor.failed {
            return None;
        }
        loop {
            let seed = self.seeds.get(cursor.seed)?;
            let start = match seek(&seed.file, SeekFrom::Data(cursor.offset)) {
                Ok(data) => data - data % self.block_size,
                // No data from here to the end.
                Err(Errno::NXIO) => seed.len,
                // A device or a file system that does not tell where data is. What is wrong
                // otherwise, reading will say.
                Err(_) => cursor.offset,
            };
            if start >= seed.len {
                cursor.before += seed.len;
                cursor.seed += 1;
                cursor.offset = 0;
                continue;
            }
            let len = PIECE.max(self.block_size).min(seed.len - start);
            let piece = Piece {
                seed: cursor.seed,
                offset: start,
                len,
            };
            cursor.offset = start + len;
            let read = cursor.before + cursor.offset;
            drop(cursor);
            (self.progress)(SeedProgress {
                read,
                total: self.total,
            });
            return Some(piece);
        }
    }

    /// The contents of a piece by name, without zeroes.
    fn names(&self, piece: &Piece, buffer: &mut [u8]) -> Result<Vec<Entry>, SeedError> {
        let seed = &self.seeds[piece.seed];
        // The last block of a file may be a part of one; zeroes stand for the rest.
        let buffer = &mut buffer[..piece.len.next_multiple_of(self.block_size) as usize];
        buffer.fill(0);
        let mut filled = 0;
        while filled < piece.len {
            let offset = piece.offset + filled;
            match seed
                .file
                .read_at(&mut buffer[filled as usize..piece.len as usize], offset)
            {
                // It has become shorter; what is gone will not be found.
                Ok(0) => break,
                Ok(read) => filled += read as u64,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(SeedError::Read {
                        path: seed.path.clone(),
                        offset,
                        source,
                    });
                }
            }
        }
        let first = seed.first + (piece.offset / self.block_size) as u32;
        Ok((first..)
            .zip(buffer.chunks_exact(self.block_size as usize))
            .filter(|(_, block)| !is_zero(block))
            .map(|(at, block)| Entry {
                name: seed_name(blake3::hash(block).as_bytes()),
                at,
            })
            .collect())
    }
}

/// Whether a block is all zero: its first byte is, and each other one is like the one before.
fn is_zero(block: &[u8]) -> bool {
    block[0] == 0 && block[1..] == block[..block.len() - 1]
}
