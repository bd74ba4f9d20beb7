//! The NBD client against servers that say what a test wants, and the survey of disks against what two
//! versions of QEMU have answered.

use std::io::{self, Read, Write};

use crate::nbd::{Client, Extent, NbdError, NbdResult};

/// Plays a server that has said everything in advance; what the client says is kept.
struct Script {
    answers: io::Cursor<Vec<u8>>,
    said: Vec<u8>,
}

impl Read for Script {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.answers.read(buf)
    }
}

impl Write for Script {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.said.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const SIZE: u64 = 1 << 20;

fn greeting() -> Vec<u8> {
    let mut bytes = b"NBDMAGICIHAVEOPT".to_vec();
    bytes.extend(3_u16.to_be_bytes());
    bytes
}

fn answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn export_info() -> Vec<u8> {
    let mut info = 0_u16.to_be_bytes().to_vec();
    info.extend(SIZE.to_be_bytes());
    info.extend(1_u16.to_be_bytes());
    info
}

/// A handshake that succeeds, with context 7.
fn handshake() -> Vec<u8> {
    let mut context = 7_u32.to_be_bytes().to_vec();
    context.extend(b"base:allocation");
    [
        greeting(),
        answer(8, 1, &[]),
        answer(10, 4, &context),
        answer(10, 1, &[]),
        answer(7, 3, &export_info()),
        answer(7, 1, &[]),
    ]
    .concat()
}

fn chunk(done: bool, kind: u16, data: &[u8]) -> Vec<u8> {
    chunk_for(1, done, kind, data)
}

fn chunk_for(cookie: u64, done: bool, kind: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(u16::from(done).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn error(errno: u32, text: &str) -> Vec<u8> {
    let len = text.len() as u16;
    [
        &errno.to_be_bytes()[..],
        &len.to_be_bytes(),
        text.as_bytes(),
    ]
    .concat()
}

fn status(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = context.to_be_bytes().to_vec();
    for (len, flags) in extents {
        bytes.extend(len.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

fn open(answers: Vec<u8>) -> NbdResult<Client<Script>> {
    let script = Script {
        answers: io::Cursor::new(answers),
        said: Vec::new(),
    };
    Client::open(script, "disk", Some("base:allocation"))
}

fn opened(reply: &[Vec<u8>]) -> Client<Script> {
    let mut answers = handshake();
    answers.extend(reply.concat());
    open(answers).expect("the handshake is right")
}

fn read(reply: &[Vec<u8>]) -> NbdResult<Vec<u8>> {
    let mut buf = vec![0xff; 16];
    opened(reply).read(4096, &mut buf).map(|()| buf)
}

#[test]
fn a_read_is_put_together_from_data_and_holes_in_any_order() {
    let bytes = read(&[
        chunk(false, 2, &hole(4104, 8)),
        chunk(false, 1, &data(4096, b"12345678")),
        chunk(true, 0, &[]),
    ]);
    assert_eq!(bytes.unwrap(), b"12345678\0\0\0\0\0\0\0\0");
}

#[test]
fn an_error_of_the_server_is_told_and_leaves_the_connection() {
    let mut client = opened(&[
        chunk(true, 0x8001, &error(5, "disk on fire")),
        chunk_for(2, true, 1, &data(0, b"ok")),
    ]);
    let failed = client.read(4096, &mut [0; 16]).unwrap_err();
    assert!(failed.is_remote() && !failed.is_not_permitted(), "{failed}");
    assert!(failed.to_string().contains("disk on fire"), "{failed}");
    let mut buf = [0; 2];
    client.read(0, &mut buf).unwrap();
    assert_eq!(&buf, b"ok");
}

#[test]
fn what_qemu_says_of_images_that_it_has_let_go_is_recognised() {
    let failed = read(&[chunk(true, 0x8001, &error(1, ""))]).unwrap_err();
    assert!(failed.is_not_permitted(), "{failed}");
    let mut simple = 0x6744_6698_u32.to_be_bytes().to_vec();
    simple.extend(1_u32.to_be_bytes());
    simple.extend(1_u64.to_be_bytes());
    assert!(read(&[simple]).unwrap_err().is_not_permitted());
}

#[test]
fn a_reply_that_does_not_fit_is_an_error_and_no_wrong_bytes() {
    let sixteen = [7; 16];
    for (what, reply) in [
        ("behind the range", chunk(true, 1, &data(4097, &sixteen))),
        ("before the range", chunk(true, 1, &data(4095, &sixteen))),
        ("too long a hole", chunk(true, 2, &hole(4096, 17))),
        (
            "an offset without end",
            chunk(true, 2, &hole(u64::MAX, u32::MAX)),
        ),
        ("too little", chunk(true, 1, &data(4096, b"12"))),
        ("nothing", chunk(true, 0, &[])),
        (
            "another request's",
            chunk_for(9, true, 1, &data(4096, &sixteen)),
        ),
        ("a chunk of no known type", chunk(true, 77, &[])),
        (
            "a status for a read",
            chunk(true, 5, &status(7, &[(16, 0)])),
        ),
        ("no reply", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
    ] {
        let failed = read(&[reply]).unwrap_err();
        assert!(matches!(failed, NbdError::Protocol(_)), "{what}: {failed}");
    }
    // Cut off anywhere, it is an error of the connection.
    let whole = chunk(true, 1, &data(4096, &sixteen));
    for len in 0..whole.len() {
        let failed = read(&[whole[..len].to_vec()]).unwrap_err();
        assert!(matches!(failed, NbdError::Io { .. }), "{len}: {failed}");
    }
    assert!(opened(&[]).read(SIZE - 8, &mut [0; 16]).is_err());
}

#[test]
fn a_write_and_a_flush_are_acknowledged_or_fail() {
    // The server may answer them by a simple reply or by a chunk.
    let simple = |cookie: u64, errno: u32| {
        let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
        bytes.extend(errno.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes
    };
    let mut client = opened(&[
        simple(1, 0),
        chunk_for(2, true, 0, &[]),
        simple(3, 28),
        simple(4, 0),
        chunk_for(5, true, 0x8001, &error(5, "bad disk")),
        // Data are no answer to a write.
        chunk_for(6, true, 1, &data(0, b"data")),
    ]);
    client.write(4096, &[1; 4096]).unwrap();
    client.flush().unwrap();
    let full = client.write(0, &[1; 4096]).unwrap_err();
    assert!(matches!(full, NbdError::Remote { errno: 28, .. }), "{full}");
    client.flush().unwrap();
    let broken = client.flush().unwrap_err().to_string();
    assert!(broken.contains("bad disk"), "{broken}");
    let outside = client.write(SIZE - 1, &[1; 2]).unwrap_err();
    assert!(!outside.is_remote(), "{outside}");
    assert!(!client.write(0, &[1; 4]).unwrap_err().is_remote());
}

#[test]
fn block_status_goes_on_until_the_end_of_the_disk() {
    let half = (SIZE / 2) as u32;
    let mut client = opened(&[
        chunk(true, 5, &status(7, &[(4096, 3), (half - 4096, 0)])),
        // The last extent may reach further than the disk.
        chunk_for(2, true, 5, &status(7, &[(half + 4096, 3)])),
    ]);
    let mut extents = Vec::new();
    client.block_status(|extent| extents.push(extent)).unwrap();
    let expected = [
        (0, 4096, 3),
        (4096, SIZE / 2 - 4096, 0),
        (SIZE / 2, SIZE / 2, 3),
    ]
    .map(|(offset, len, flags)| Extent { offset, len, flags });
    assert_eq!(extents, expected);
}

#[test]
fn a_block_status_that_gets_nowhere_is_an_error() {
    for reply in [
        chunk(true, 0, &[]),
        chunk(true, 5, &status(7, &[(0, 0)])),
        chunk(true, 5, &status(8, &[(4096, 0)])),
        chunk(true, 5, &7_u32.to_be_bytes()),
    ] {
        assert!(opened(&[reply]).block_status(|_| ()).is_err());
    }
}

#[test]
fn a_handshake_that_fails_says_why() {
    let refused = [
        greeting(),
        answer(8, 1, &[]),
        answer(10, (1 << 31) | 6, b"no such export"),
    ];
    let text = open(refused.concat()).map(drop).unwrap_err().to_string();
    assert!(text.contains("no such export"), "{text}");
    // The server has the export but not the context.
    let without = [greeting(), answer(8, 1, &[]), answer(10, 1, &[])];
    let text = open(without.concat()).map(drop).unwrap_err().to_string();
    assert!(text.contains("base:allocation"), "{text}");
    let mut long = [greeting(), answer(8, 1, &[])].concat();
    long.truncate(long.len() - 4);
    long.extend(u32::MAX.to_be_bytes());
    assert!(open(long).is_err(), "an answer of 4 GiB");
    for len in 0..handshake().len() {
        assert!(
            open(handshake()[..len].to_vec()).is_err(),
            "cut off at {len}"
        );
    }
    assert!(open(b"220 mail.example ESMTP".to_vec()).is_err());
    assert_eq!(open(handshake()).unwrap().size(), SIZE);
}
