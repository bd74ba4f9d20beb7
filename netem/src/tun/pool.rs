//! Buffers for frames under way, kept for reuse: no allocation per packet once a link is busy. It
//! bounds what is kept idle, not what is in use; the link bounds that.

use super::gso::MAX_FRAME;

/// Room of the smallest buffers: a full packet on nearly every link. The classes double from here.
const SMALLEST: usize = 2048;

/// Classes of buffers; the last one has room for any frame.
const CLASSES: usize = 6;

/// Bytes of idle buffers kept in each class.
const IDLE_BYTES: usize = 32 << 20;

/// Idle buffers by their room.
#[derive(Debug, Default)]
pub struct Pool {
    classes: [Vec<Vec<u8>>; CLASSES],
}

impl Pool {
    /// A buffer with room for `bytes`, at most about half of it unused. Its length and contents are left
    /// from its last use.
    pub fn take(&mut self, bytes: usize) -> Vec<u8> {
        let class = class_for(bytes);
        let buffer = self.classes[class].pop();
        buffer.unwrap_or_else(|| Vec::with_capacity(room_of(class)))
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: Vec<u8>) {
        // The largest class with no more room than the buffer has.
        let class = (0..CLASSES).rfind(|class| room_of(*class) <= buffer.capacity());
        if let Some(class) = class
            && (self.classes[class].len() + 1) * room_of(class) <= IDLE_BYTES
        {
            self.classes[class].push(buffer);
        }
    }
}

/// The smallest class with room for `bytes`.
fn class_for(bytes: usize) -> usize {
    let class = bytes.div_ceil(SMALLEST).next_power_of_two().ilog2() as usize;
    class.min(CLASSES - 1)
}

fn room_of(class: usize) -> usize {
    if class + 1 == CLASSES {
        MAX_FRAME
    } else {
        SMALLEST << class
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_have_the_room_asked_for_and_come_back() {
        let mut pool = Pool::default();
        for bytes in [0, 1, 2048, 2049, 4096, 9000, 32768, 32769, 65536, MAX_FRAME] {
            let buffer = pool.take(bytes);
            assert!(buffer.capacity() >= bytes, "{bytes}");
            assert!(bytes < SMALLEST || buffer.capacity() < 3 * bytes, "{bytes}");
            let place = buffer.as_ptr();
            pool.give(buffer);
            let again = pool.take(bytes);
            assert_eq!(again.as_ptr(), place, "{bytes}");
        }
    }

    #[test]
    fn idle_buffers_are_bounded() {
        let mut pool = Pool::default();
        for _ in 0..2 * IDLE_BYTES / SMALLEST {
            pool.give(Vec::with_capacity(SMALLEST));
        }
        assert_eq!(pool.classes[0].len(), IDLE_BYTES / SMALLEST);
        pool.give(Vec::new());
        assert_eq!(
            pool.classes.iter().map(Vec::len).sum::<usize>(),
            IDLE_BYTES / SMALLEST
        );
    }
}
