//! Batches of blocks: what a source makes of the contents it read, and what a destination makes of
//! the bytes that arrive. A batch describes itself completely, so that batches can arrive in any
//! order. Nothing here knows of connections or guests.
//!
//! - [`BlockEncoder`] chooses for every block the cheapest form: zero, named (by what the
//!   destination has in files of its own, [`SeedNames`], or was sent before), difference, compressed,
//!   as it is.
//! - [`decode_batch`] checks everything that can be checked without the guest, [`Batch::apply`]
//!   does the rest against a [`BatchTarget`].

mod apply;
mod classify;
mod decode;
mod encode;
mod history;
mod seeds;
mod stats;
mod varint;
mod wire;

pub use apply::{ApplyError, ApplyStats, BatchTarget};
pub use decode::{Batch, decode_batch};
pub use encode::{
    BatchMaker, BlockEncoder, EncodeError, EncodedBatch, EncoderConfig, EncoderMemory, Looked,
    Refer, Sorted,
};
pub use seeds::{MAX_SEED_PIECES, SeedNames, SeedNamesError, seed_name};
pub use stats::{CodecCount, CodecStats};
pub use wire::{
    BATCH_FORMAT, BatchHeader, Codec, Limits, MAX_BATCH, MAX_BATCH_CONTENTS, MAX_STATE,
    MAX_STATE_PIECE, MIN_BLOCK_SIZE, WireError,
};
