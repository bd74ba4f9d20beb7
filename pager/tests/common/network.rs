//! A source of a disk's blocks behind an emulated round trip: contents that can be recomputed.
#![allow(dead_code)] // the fixture and each test file use a part of it

use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hybridmig_pager::disk::DiskImage;
use hybridmig_pager::{FaultAnswer, FaultSink, PagerError};

use super::pattern;

/// Every how many blocks one is zero at the source.
const ZERO: u32 = 7;

/// What the source has in `buf.len()` bytes from `block` on, a whole block.
pub fn contents(seed: u64, block: u32, buf: &mut [u8]) {
    if block.is_multiple_of(ZERO) {
        buf.fill(0);
    } else {
        pattern::fill(seed, block << 8, buf);
    }
}

/// All of the source's disk.
pub fn whole(seed: u64, bytes: u64, block_size: u32) -> Vec<u8> {
    let blocks = bytes.div_ceil(u64::from(block_size)) as u32;
    let mut all = vec![0; blocks as usize * block_size as usize];
    for (block, data) in (0..).zip(all.chunks_exact_mut(block_size as usize)) {
        contents(seed, block, data);
    }
    all.truncate(bytes as usize);
    all
}

enum Message {
    Asked(u32, Instant),
    Push(u32),
    End,
}

/// The sink that asks over the emulated network.
pub struct Ask {
    to: Mutex<Sender<Message>>,
    /// Blocks that were asked for.
    pub asked: Mutex<Vec<u32>>,
    /// Blocks that need not come.
    pub removed: Mutex<Vec<u32>>,
}

impl Ask {
    fn send(&self, message: Message) {
        let to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        // After the end nobody listens, and nothing is missing.
        let _ = to.send(message);
    }

    /// Sends blocks that nobody asked for, in this order.
    pub fn push(&self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            self.send(Message::Push(block));
        }
    }
}

impl FaultSink for Ask {
    fn fault(&self, _region: u16, block: u32) -> FaultAnswer {
        self.asked.lock().unwrap().push(block);
        self.send(Message::Asked(block, Instant::now()));
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, first: u32, count: u32) {
        self.removed.lock().unwrap().extend(first..first + count);
    }

    fn failed(&self, error: PagerError) {
        panic!("the disk failed: {error}");
    }
}

/// The network's thread.
pub struct Network {
    pub sink: Arc<Ask>,
    from: Option<Receiver<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl Network {
    pub fn new() -> Self {
        let (to, from) = mpsc::channel();
        Self {
            sink: Arc::new(Ask {
                to: Mutex::new(to),
                asked: Mutex::default(),
                removed: Mutex::default(),
            }),
            from: Some(from),
            thread: None,
        }
    }

    /// Answers what is asked for after `delay`, from now on.
    pub fn connect(&mut self, disk: Arc<DiskImage>, seed: u64, delay: Duration) {
        let from = self.from.take().expect("connected once");
        self.thread = Some(std::thread::spawn(move || {
            let mut data = vec![0; disk.block_size() as usize];
            for message in from {
                let block = match message {
                    Message::Asked(block, since) => {
                        // The emulated round trip; requests overlap, as they do on a link.
                        std::thread::sleep(
                            (since + delay).saturating_duration_since(Instant::now()),
                        );
                        block
                    }
                    Message::Push(block) => block,
                    Message::End => return,
                };
                contents(seed, block, &mut data);
                if data.iter().all(|byte| *byte == 0) {
                    disk.place_zero(block, 1).unwrap();
                } else {
                    disk.place(block, &data).unwrap();
                }
            }
        }));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.sink.send(Message::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the network's thread has panicked");
        }
    }
}
