//! Encoding on several threads that share one memory of what was sent. Batches that may refer to it
//! pass it in the order in which the machine handed them out, or a later version of a block could be
//! taken for the earlier one; all that takes time is done before and after.

use std::sync::{Condvar, Mutex, MutexGuard};

use hybridmig_transport::codec::{
    EncodeError, EncoderConfig, EncoderMemory, Looked, Refer, Sorted,
};

/// The memory, and whose turn it is.
pub(super) struct Recollection {
    inner: Mutex<Inner>,
    turned: Condvar,
}

struct Inner {
    memory: EncoderMemory,
    /// Place in the queue of the batch that is next.
    turn: u64,
    /// Places given so far.
    given: u64,
}

impl Recollection {
    pub(super) fn new(config: &EncoderConfig) -> Self {
        Self {
            inner: Mutex::new(Inner {
                memory: EncoderMemory::new(config),
                turn: 0,
                given: 0,
            }),
            turned: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("not poisoned")
    }

    /// The next place in the queue. To be taken in the order of the batches.
    pub(super) fn place(&self) -> Place<'_> {
        let mut inner = self.lock();
        let number = inner.given;
        inner.given += 1;
        Place { of: self, number }
    }

    /// Changes the memory between two batches.
    pub(super) fn change(&self, change: impl FnOnce(&mut EncoderMemory)) {
        change(&mut self.lock().memory);
    }
}

/// A batch's place in the queue. Dropped without having been used it lets the next one pass.
pub(super) struct Place<'a> {
    of: &'a Recollection,
    number: u64,
}

impl Place<'_> {
    /// Waits for its turn, then recalls what the batch may refer to.
    pub(super) fn recall(
        self,
        looked: Looked<'_>,
        batch: u64,
        refer: Refer,
    ) -> Result<Sorted<'_>, EncodeError> {
        // The turn is passed on by the drop, after the lock is given back.
        let mut inner = self.wait();
        looked.recall(&mut inner.memory, batch, refer)
    }

    fn wait(&self) -> MutexGuard<'_, Inner> {
        let inner = self.of.lock();
        self.of
            .turned
            .wait_while(inner, |inner| inner.turn != self.number)
            .expect("not poisoned")
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // Not by way of `expect`: a second panic in a drop would end the process.
        let Ok(inner) = self.of.inner.lock() else {
            return;
        };
        let turn = self
            .of
            .turned
            .wait_while(inner, |inner| inner.turn != self.number);
        if let Ok(mut inner) = turn {
            inner.turn += 1;
            self.of.turned.notify_all();
        }
    }
}

/// Processor time of the calling thread.
pub(super) fn thread_time() -> std::time::Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    std::time::Duration::new(
        time.tv_sec.try_into().unwrap_or(0),
        time.tv_nsec.try_into().unwrap_or(0),
    )
}

/// Threads that encode the bulk lane: one core is left to the link and the rest of the process.
pub(super) fn bulk_threads() -> usize {
    /// Beyond this the memory that they share, and the machine, are the limit.
    const MOST: usize = 8;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    cores.saturating_sub(1).clamp(1, MOST)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use hybridmig_transport::Lane;
    use hybridmig_transport::codec::{BatchHeader, BatchMaker, BatchTarget, Limits, decode_batch};
    use hybridmig_transport::message::{RegionId, RegionInfo, RegionKind};

    use super::*;

    const RAM: RegionId = RegionId(0);
    const SIZE: usize = 4096;
    const BLOCKS: u32 = 256;

    fn config() -> EncoderConfig {
        EncoderConfig {
            index_entries: 1024,
            delta_cache_bytes: 4 << 20,
            ..EncoderConfig::default()
        }
    }

    /// Contents of a block in a pass: some are noise, some text, some zero, some as another's.
    fn contents(block: u32, pass: u32) -> Vec<u8> {
        let seed = match block % 5 {
            0 => return vec![0; SIZE],
            // Unchanged from pass to pass, and equal among themselves.
            1 => 7,
            // Changed a little.
            2 => {
                let mut data = contents(block + 1, 0);
                data[pass as usize] ^= 1;
                return data;
            }
            3 => u64::from(block),
            _ => u64::from(block * 100 + pass),
        };
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut data: Vec<u8> = (0..SIZE / 8).flat_map(|_| next().to_le_bytes()).collect();
        if block % 2 == 1 {
            for byte in &mut data {
                *byte &= 0x07;
            }
        }
        data
    }

    #[derive(Default)]
    struct Target {
        blocks: BTreeMap<u32, Vec<u8>>,
        rejected: usize,
    }

    impl BatchTarget for Target {
        type Error = std::convert::Infallible;

        fn admit(&mut self, _: RegionId, _: u32, _: u32) -> bool {
            true
        }

        fn read(&mut self, _: RegionId, block: u32, buf: &mut [u8]) -> Result<(), Self::Error> {
            match self.blocks.get(&block) {
                Some(data) => buf.copy_from_slice(data),
                None => buf.fill(0),
            }
            Ok(())
        }

        fn write(&mut self, _: RegionId, first: u32, data: &[u8]) -> Result<(), Self::Error> {
            for (block, data) in (first..).zip(data.chunks_exact(SIZE)) {
                self.blocks.insert(block, data.to_vec());
            }
            Ok(())
        }

        fn zero(&mut self, _: RegionId, first: u32, count: u32) -> Result<(), Self::Error> {
            for block in first..first + count {
                self.blocks.insert(block, vec![0; SIZE]);
            }
            Ok(())
        }

        fn state(&mut self, _: u64, _: &[u8]) -> Result<(), Self::Error> {
            Ok(())
        }

        fn reject(&mut self, _: RegionId, _: u32) {
            self.rejected += 1;
        }
    }

    #[test]
    fn many_threads_encode_what_one_does() {
        const CHUNK: u32 = 16;
        const CHUNKS: u64 = (BLOCKS / CHUNK) as u64;
        let memory = Recollection::new(&config());
        let regions = [RegionInfo {
            id: RAM,
            kind: RegionKind::Memory,
            name: "ram".to_owned(),
            blocks: BLOCKS,
            block_size: SIZE as u32,
        }];
        let mut target = Target::default();
        let mut alone = hybridmig_transport::codec::BlockEncoder::new(config()).unwrap();
        for pass in 0..4_u32 {
            // Taking a chunk and a place is one step, as under the machine's lock.
            let next = Mutex::new(u64::from(pass) * CHUNKS);
            let end = u64::from(pass + 1) * CHUNKS;
            let encoded = Mutex::new(BTreeMap::new());
            let parts = |id: u64| {
                let first = (id % CHUNKS) as u32 * CHUNK;
                let blocks: Vec<u32> = (first..first + CHUNK).collect();
                let data: Vec<u8> = blocks.iter().flat_map(|b| contents(*b, pass)).collect();
                let header = BatchHeader {
                    id,
                    pass,
                    lane: Lane::Bulk,
                };
                (blocks, data, header)
            };
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let mut maker = BatchMaker::new(1).unwrap();
                        loop {
                            let mut next = next.lock().unwrap();
                            let id = *next;
                            if id == end {
                                return;
                            }
                            *next += 1;
                            let place = memory.place();
                            drop(next);
                            let (blocks, data, header) = parts(id);
                            let looked = maker.look(RAM, SIZE as u32, &blocks, &data, true);
                            let sorted = place.recall(looked.unwrap(), id, Refer::Anything);
                            let batch = sorted.unwrap().write(header).unwrap();
                            encoded.lock().unwrap().insert(id, batch.bytes);
                        }
                    });
                }
            });
            let encoded = encoded.into_inner().unwrap();
            assert_eq!(encoded.len() as u64, CHUNKS);
            for (id, bytes) in encoded {
                let (blocks, data, header) = parts(id);
                let expected = alone
                    .encode_blocks(header, RAM, SIZE as u32, &blocks, &data, Refer::Anything)
                    .unwrap();
                assert!(bytes == expected.bytes, "batch {id} is another");
                let limits = Limits { regions: &regions };
                let batch = decode_batch(&bytes, &limits).unwrap();
                batch.apply(&mut target).unwrap();
            }
            for id in u64::from(pass) * CHUNKS..end {
                memory.change(|memory| memory.acknowledge(id));
                alone.acknowledge(id);
            }
            for block in 0..BLOCKS {
                assert!(
                    target.blocks[&block] == contents(block, pass),
                    "block {block}"
                );
            }
        }
        assert_eq!(target.rejected, 0);
    }

    #[test]
    fn whoever_gives_up_lets_the_others_pass_in_order() {
        let memory = Recollection::new(&config());
        let places: Vec<_> = (0..3).map(|_| memory.place()).collect();
        let [first, second, third] = places.try_into().ok().unwrap();
        let passed = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let late = scope.spawn(|| {
                let mut maker = BatchMaker::new(1).unwrap();
                let data = vec![1; SIZE];
                let looked = maker.look(RAM, SIZE as u32, &[0], &data, true).unwrap();
                third.recall(looked, 2, Refer::Nothing).unwrap();
                passed.fetch_add(1, Ordering::SeqCst);
            });
            // Gives up before it is its turn, and must not overtake.
            let giving_up = scope.spawn(|| drop(second));
            // Time for what must not happen.
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(passed.load(Ordering::SeqCst), 0);
            assert!(!giving_up.is_finished());
            drop(first);
            late.join().unwrap();
            giving_up.join().unwrap();
        });
        assert_eq!(passed.load(Ordering::SeqCst), 1);
    }
}
