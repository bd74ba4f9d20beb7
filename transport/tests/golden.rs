//! The wire, byte by byte. A failure here means that this build no longer speaks with those before:
//! a change of the wire needs a new protocol version.

use hybridmig_transport::Lane;
use hybridmig_transport::codec::{
    BatchHeader, BlockEncoder, EncoderConfig, Limits, decode_batch, seed_name,
};
use hybridmig_transport::frame::{decode_message, encode_frame};
use hybridmig_transport::message::{Message, RegionId, RegionInfo, RegionKind, SessionId};

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[test]
fn messages() {
    let hello = Message::Hello {
        versions: vec![1],
        features: 3,
        software: "hybridmig 0.1.0".to_owned(),
        session: SessionId([1, 2, 3, 4, 5, 6, 7, 8]),
        resume: false,
    };
    let missing = Message::Missing {
        region: RegionId(2),
        blocks: [1, 5, 70_000].into_iter().collect(),
    };
    let fetch = Message::Fetch {
        region: RegionId(0),
        blocks: vec![300],
    };
    let seeds = Message::Seeds {
        block_size: 65_536,
        names: vec![1, 0x0807_0605_0403_0201],
    };
    for (message, wire) in [
        (hello, HELLO),
        (missing, MISSING),
        (fetch, FETCH),
        (Message::Released, RELEASED),
        (seeds, SEEDS),
    ] {
        let frame = encode_frame(&message).unwrap();
        assert_eq!(hex(&frame), wire, "{message:?}");
        assert_eq!(decode_message(&frame[4..]), Ok(message));
    }
}

const HELLO: &str = "1d000000000101030f6879627269646d696720302e312e30010203040506070800";
const MISSING: &str = "210000000f021e3a300000020000000000010001000000180000001c000000010005007011";
const FETCH: &str = "050000000a0001ac02";
const RELEASED: &str = "010000000c";
const SEEDS: &str = "15000000108080041001000000000000000102030405060708";
const SEEDED: &str = "01ae02020206000109017f60255328ebb72d20c398c5c903154edaed852c0cc0\
                      568655a3a0c41f2c6439adf4b48c1b852a7f3c";
const BATCH: &str = "01ac020202040001080143002f735b2c78da220007c398c5c903154edaed852c0cc0\
                     568655a3a0c41f2c6439adf4b48c1b852a7f3c000001c80102b6288f964a35bbc000";
const STATE: &str = "01ad02020205800405bb58d924f1cafb4c";

#[test]
fn batches() {
    let regions = [RegionInfo {
        id: RegionId(0),
        kind: RegionKind::Disk,
        name: "disk".to_owned(),
        blocks: 1000,
        block_size: 512,
    }];
    let limits = Limits { regions: &regions };
    let header = |id| BatchHeader {
        id,
        pass: 2,
        lane: Lane::Freeze,
    };
    // Noise of one's own, so that nobody's random numbers are part of the wire.
    let noise: Vec<u8> = (0..512_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut encoder = BlockEncoder::new(EncoderConfig {
        index_entries: 64,
        ..EncoderConfig::default()
    })
    .unwrap();
    let first = encoder
        .encode_blocks(header(299), RegionId(0), 512, &[7], &noise, true)
        .unwrap();
    assert_eq!(decode_batch(&first.bytes, &limits).unwrap().blocks(), 1);
    encoder.acknowledge(299);
    let contents = [&noise[..], &[0; 1024]].concat();
    let batch = encoder
        .encode_blocks(
            header(300),
            RegionId(0),
            512,
            &[8, 200, 201],
            &contents,
            true,
        )
        .unwrap();
    assert_eq!(hex(&batch.bytes), BATCH);
    assert_eq!(decode_batch(&batch.bytes, &limits).unwrap().blocks(), 3);
    // zstd's own bytes may differ between its releases; what is before them may not.
    let state = encoder.encode_state(header(301), 512, b"state").unwrap();
    assert_eq!(hex(&state.bytes[..17]), STATE);
    let name = seed_name(blake3::hash(&noise).as_bytes());
    encoder.seeds().learn(512, vec![name]).unwrap();
    let batch = encoder
        .encode_blocks(header(302), RegionId(0), 512, &[9], &noise, false)
        .unwrap();
    assert_eq!(hex(&batch.bytes), SEEDED);
    assert_eq!(decode_batch(&batch.bytes, &limits).unwrap().blocks(), 1);
}

#[test]
fn datagrams() {
    use hybridmig_transport::link::urgent::parcel::split;
    use hybridmig_transport::link::urgent::wire::{Acked, Shape, encode_ack};
    let mut shape = Shape::of(9, b"fetch");
    shape.parity = 1;
    let pieces = split(258, shape, b"fetch").unwrap();
    assert_eq!(hex(&pieces[1].encode(32)), PIECE);
    let acked = [Acked { id: 258, seen: 3 }, Acked { id: 256, seen: 1 }];
    assert_eq!(hex(&encode_ack(&acked)), ACK);
    // Parity is part of the wire: here of 2 + 2 pieces.
    let contents: Vec<u8> = (0..1500_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let mut shape = Shape::of(17, &contents);
    shape.parity = 2;
    let pieces = split(0, shape, &contents).unwrap();
    let starts: Vec<String> = pieces.iter().map(|piece| hex(&piece.bytes[..8])).collect();
    assert_eq!(starts, STARTS);
}

#[test]
fn parity_of_streams() {
    use hybridmig_transport::link::repair::wire::parity_of;
    // Two data pieces of 256 bytes, the second one padded, and three of parity in two datagrams.
    let contents: Vec<u8> = (0..300_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let parity = parity_of(258, &[&[18], &contents], 3, 600).unwrap();
    let starts: Vec<String> = parity
        .iter()
        .map(|parity| hex(&parity.encode(0)[..34]))
        .collect();
    assert_eq!(starts, PARITY);
}

const PARITY: [&str; 2] = [
    "0302010000000000002d010000030000000246a72778b26f90d9b48a0a84a8a692d0",
    "0302010000000000002d010000030002000146a72778b26f90d98353db469f1c0429",
];
const PIECE: &str = "0102010000000000000905000101010027eb8c0aa1c36a4b6665746368000000";
const ACK: &str = "02020201000000000000000003000000020001000000";
const STARTS: [&str; 4] = [
    "00bb7733efab6622",
    "34efab6723df9a56",
    "c167d51254b4073a",
    "f533094698c0fb4e",
];
