//! A peer that is trusted and breaks the protocol: the link ends with an error that names it, and
//! it is told what it did. The peer is written by hand on bare QUIC.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hybridmig_transport::frame::encode_frame;
use hybridmig_transport::message::Message;
use hybridmig_transport::{
    ALPN, CloseCode, Endpoint, Fingerprint, Identity, Link, LinkError, TransportConfig,
    TransportError, Trust,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

const LOCALHOST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Believes whatever the server shows.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// A bare client; with a certificate if `trusted`. Returns it with the server that awaits it.
fn bare(
    alpn: &[u8],
    with_certificate: bool,
    config: &TransportConfig,
) -> (quinn::Endpoint, Endpoint) {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["x".to_owned()]).unwrap();
    let trust = Trust::new().with_peer(Fingerprint::of(cert.der()));
    let bob = Identity::generate().unwrap();
    let server = Endpoint::server(LOCALHOST, &bob, trust, config).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut tls = if with_certificate {
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        tls.with_client_auth_cert(vec![cert.der().clone()], key.into())
            .unwrap()
    } else {
        tls.with_no_client_auth()
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut client = quinn::Endpoint::client(LOCALHOST).unwrap();
    client.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    (client, server)
}

fn greeting(windows: [u64; 3]) -> Vec<u8> {
    let limits = windows.iter().flat_map(|window| window.to_le_bytes());
    std::iter::once(1).chain(limits).collect()
}

/// A trusted bare client whose greeting has been sent, and the server's link. The credit stream
/// must be kept.
async fn trusted() -> (quinn::Connection, quinn::SendStream, Link, Endpoint) {
    trusted_with(&TransportConfig::default()).await
}

async fn trusted_with(
    config: &TransportConfig,
) -> (quinn::Connection, quinn::SendStream, Link, Endpoint) {
    let (client, server) = bare(ALPN, true, config);
    let addr = server.local_addr().unwrap();
    let connection = client.connect(addr, "x").unwrap().await.unwrap();
    let mut credit = connection.open_uni().await.unwrap();
    credit.write_all(&greeting([8 << 20; 3])).await.unwrap();
    let link = server.accept().await.unwrap();
    (connection, credit, link, server)
}

/// The link ended because of what the peer did, and the peer was told.
async fn ended(connection: &quinn::Connection, link: &Link, words: &str) {
    let work = async {
        match link.closed().await {
            LinkError::Protocol { peer, what } => {
                assert_eq!(peer, link.peer_addr());
                assert!(what.contains(words), "{what}");
            }
            other => panic!("{other}"),
        }
        match connection.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) => {
                assert_eq!(
                    close.error_code.into_inner(),
                    u64::from(CloseCode::PROTOCOL.0)
                );
                assert!(String::from_utf8_lossy(&close.reason).contains(words));
            }
            other => panic!("{other}"),
        }
    };
    tokio::time::timeout(Duration::from_secs(30), work)
        .await
        .expect("the link goes on");
}

#[tokio::test]
async fn illegal_streams_end_the_link() {
    let large = vec![19; 600 << 10];
    let larger = vec![19; 2 << 20];
    for (bytes, words) in [
        (&b""[..], "empty stream"),
        (b"\x63hello", "unknown kind 99"),
        (b"\x10batch on control", "unknown kind 16"),
        (b"\x01", "unknown kind 1"),
        (b"\x09\xff\xff\xff\xff", "malformed message"),
        (&large, "a batch of"),
        (&larger, "a stream of more than"),
    ] {
        let (connection, _credit, link, _server) = trusted().await;
        let mut stream = connection.open_uni().await.unwrap();
        // The link may end before all of it is written.
        let _cut_short = stream.write_all(bytes).await;
        let _cut_short = stream.finish();
        ended(&connection, &link, words).await;
        let error = link.next_incoming().await.unwrap_err();
        assert!(matches!(error, LinkError::Protocol { .. }), "{error}");
    }
}

#[tokio::test]
async fn illegal_datagrams_end_the_link() {
    use hybridmig_transport::link::urgent::parcel::split;
    use hybridmig_transport::link::urgent::wire::{Acked, Shape, WINDOW, encode_ack};
    let piece = |id: u64, kind: u8, contents: &[u8]| {
        let shape = Shape::of(kind, contents);
        split(id, shape, contents).unwrap().remove(0).encode(0)
    };
    let mut forged = piece(0, 17, b"contents").to_vec();
    *forged.last_mut().unwrap() ^= 1;
    for (datagram, words) in [
        (Bytes::from_static(b"\x07?"), "unknown kind 7"),
        (Bytes::from_static(b"\x01short"), "urgent piece of 6 bytes"),
        (forged.into(), "do not make its contents"),
        (piece(0, 16, b"control"), "urgent parcel of unknown kind 16"),
        (piece(0, 9, b"\xff\xff\xff\xff"), "malformed message"),
        (piece(WINDOW, 17, b"far"), "urgent parcel 1024"),
        (encode_ack(&[Acked { id: 0, seen: 1 }]), "never sent"),
    ] {
        let (connection, _credit, link, _server) = trusted().await;
        connection.send_datagram(datagram).unwrap();
        ended(&connection, &link, words).await;
    }
    for (bytes, words) in [
        (&b"\x18\x00\x00"[..], "not even an id"),
        (b"\x18\0\0\0\0\0\0\0\0\x12x", "unknown kind 18"),
        (b"\x18\xff\xff\0\0\0\0\0\0\x11x", "urgent parcel 65535"),
    ] {
        let (connection, _credit, link, _server) = trusted().await;
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.finish().unwrap();
        ended(&connection, &link, words).await;
    }
}

#[tokio::test]
async fn half_parcels_take_no_more_than_credit() {
    use hybridmig_transport::link::urgent::parcel::split;
    use hybridmig_transport::link::urgent::wire::{MAX_PARCEL, Shape};
    let config = TransportConfig {
        bandwidth_hint: Some(1),
        rtt_hint: Some(Duration::from_millis(1)),
        ..TransportConfig::default()
    };
    let (connection, _credit, link, _server) = trusted_with(&config).await;
    // All lanes, what is urgent once more: 8 + 8 + 2 × 4 MiB, and a bit. A parcel's first piece
    // claims all of it; the window of parcels would be 16 MiB. So bulk takes its part first.
    let batch = [&[19][..], &vec![0; 400 << 10]].concat();
    for _ in 0..26 {
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&batch).await.unwrap();
        stream.finish().unwrap();
    }
    let contents = vec![1; MAX_PARCEL];
    for id in 0..1024 {
        let first = split(id, Shape::of(17, &contents), &contents)
            .unwrap()
            .remove(0);
        // The link may end before all of it is sent.
        if connection
            .send_datagram_wait(first.encode(0))
            .await
            .is_err()
        {
            break;
        }
    }
    ended(&connection, &link, "more was sent than credit was given").await;
}

#[tokio::test]
async fn illegal_parity_ends_the_link() {
    use hybridmig_transport::link::repair::wire::parity_of;
    let of = |stream, byte| parity_of(stream, &[&[byte; 3000]], 4, 1124).unwrap();
    let mut cut = of(1, 18)[0].encode(0).to_vec();
    cut.pop();
    for (datagrams, words) in [
        (vec![Bytes::from(cut)], "a datagram of parity of"),
        (vec![of(5000, 18)[0].encode(0)], "parity of stream 5000"),
        (
            vec![of(1, 18)[0].encode(0), of(1, 19)[0].encode(0)],
            "that contradicts it",
        ),
    ] {
        let (connection, _credit, link, _server) = trusted().await;
        for datagram in datagrams {
            connection.send_datagram_wait(datagram).await.unwrap();
        }
        ended(&connection, &link, words).await;
    }
    // Parity that restores something else than the stream, and a stream whose contents nobody knows.
    for (first, kind, words) in [
        (18, 19, "does not make its contents"),
        (99, 99, "unknown kind"),
    ] {
        let (connection, _credit, link, _server) = trusted().await;
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&[first; 2500]).await.unwrap();
        for parity in of(1, kind) {
            connection
                .send_datagram_wait(parity.encode(0))
                .await
                .unwrap();
        }
        ended(&connection, &link, words).await;
    }
}

#[tokio::test]
async fn parity_without_end_is_not_held() {
    use hybridmig_transport::link::repair::wire::parity_of;
    // Of streams that never begin, ten times what is held at most; then one that is whole all the same.
    let (connection, _credit, link, _server) = trusted().await;
    let contents = vec![18; 30_000];
    for number in 0..40_u64 * 1024 {
        let mut parity = parity_of(1 + number % 4000, &[&contents], 4, 1124).unwrap();
        let mut parity = parity.remove(0);
        parity.first = (number / 4000 * 4) as u16 % 8;
        parity.shape.parity = 8;
        connection
            .send_datagram_wait(parity.encode(0))
            .await
            .unwrap();
    }
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&contents).await.unwrap();
    stream.finish().unwrap();
    match link.next_incoming().await.unwrap() {
        hybridmig_transport::Incoming::Batch { bytes, .. } => assert_eq!(bytes, contents[1..]),
        message @ hybridmig_transport::Incoming::Message(_) => panic!("{message:?}"),
    }
}

#[tokio::test]
async fn illegal_copies_of_control_messages_end_the_link() {
    use hybridmig_transport::link::urgent::parcel::split;
    use hybridmig_transport::link::urgent::wire::Shape;
    // A copy of nothing; a copy that is a stream of its own.
    let (connection, _credit, link, _server) = trusted().await;
    let empty = 0_u64.to_le_bytes();
    let piece = split(0, Shape::of(2, &empty), &empty).unwrap().remove(0);
    connection
        .send_datagram_wait(piece.encode(0))
        .await
        .unwrap();
    ended(&connection, &link, "an empty copy").await;
    let (connection, _credit, link, _server) = trusted().await;
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(&[2; 20]).await.unwrap();
    stream.finish().unwrap();
    ended(&connection, &link, "unknown kind 2").await;
}

#[tokio::test]
async fn illegal_frames_end_the_link() {
    let mut trailing = encode_frame(&Message::Released).unwrap();
    trailing[0] += 1;
    trailing.push(0);
    for (bytes, words) in [
        (&b"\xff\xff\xff\x7f"[..], "message of"),
        (b"\x02\x00\x00\x00\x63\x00", "malformed"),
        (&trailing, "1 bytes too many"),
    ] {
        let (connection, _credit, link, _server) = trusted().await;
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        let (_sender, mut receiver) = link.accept_control().await.unwrap();
        let error = receiver.recv().await.unwrap_err();
        assert!(matches!(error, LinkError::Protocol { .. }), "{error}");
        ended(&connection, &link, words).await;
    }
}

#[tokio::test]
async fn illegal_credit_ends_the_link() {
    let less = [&[3][..], &1_u64.to_le_bytes()].concat();
    let unknown = [&[0][..], &u64::MAX.to_le_bytes()].concat();
    for (update, words) in [(less, "took credit back"), (unknown, "unknown lane")] {
        let (connection, mut credit, link, _server) = trusted().await;
        credit.write_all(&update).await.unwrap();
        ended(&connection, &link, words).await;
    }
    let (connection, mut credit, link, _server) = trusted().await;
    credit.finish().unwrap();
    ended(&connection, &link, "ended the credit stream").await;
}

#[tokio::test]
async fn a_stream_that_is_reset_or_stopped_ends_the_link() {
    let (connection, _credit, link, _server) = trusted().await;
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(b"\x13half").await.unwrap();
    stream.reset(0_u8.into()).unwrap();
    ended(&connection, &link, "reset a stream").await;

    let (connection, _credit, link, _server) = trusted().await;
    let _first_is_credit = connection.accept_uni().await.unwrap();
    let batch = vec![0; 300 << 10].into();
    // Stopped before or after QUIC had all of it, as it comes.
    let (_either, stream) = tokio::join!(
        link.send_batch(hybridmig_transport::Lane::Bulk, batch),
        connection.accept_uni()
    );
    let mut stream = stream.unwrap();
    stream.stop(0_u8.into()).unwrap();
    ended(&connection, &link, "stopped a stream").await;
}

#[tokio::test]
async fn a_wrong_start_never_becomes_a_link() {
    for (first, words) in [
        (
            greeting([1 << 20, 8 << 20, 8 << 20]),
            "less than one message",
        ),
        (vec![16; 25], "not the credit stream"),
    ] {
        let (client, server) = bare(ALPN, true, &TransportConfig::default());
        let addr = server.local_addr().unwrap();
        let connection = client.connect(addr, "x").unwrap().await.unwrap();
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&first).await.unwrap();
        match server.accept().await.unwrap_err() {
            TransportError::Handshake { what, .. } => assert!(what.contains(words), "{what}"),
            other => panic!("{other}"),
        }
    }
    for (alpn, with_certificate) in [(&b"h3"[..], true), (ALPN, false)] {
        let (client, server) = bare(alpn, with_certificate, &TransportConfig::default());
        let addr = server.local_addr().unwrap();
        let connecting = client.connect(addr, "x").unwrap();
        let (connection, accepted) = tokio::join!(connecting, server.accept());
        match accepted.unwrap_err() {
            TransportError::Handshake { .. } | TransportError::Refused { .. } => {}
            other => panic!("{other}"),
        }
        // Without a certificate the client's own handshake may be over before it is refused.
        if let Ok(connection) = connection {
            connection.closed().await;
        }
    }
}
