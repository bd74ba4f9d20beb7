//! Measures what TCP gets through the link between two namespaces on this machine, and how late the
//! emulator is: the figure that says which links can be emulated here.
//! `cargo run --release -p hybridmig-netem --example tun_throughput -- "delay 5ms" [SECONDS] [plain]`

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use hybridmig_netem::{TunConfig, TunLink};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let link = arguments.next().unwrap_or_default();
    let seconds = arguments.next().map_or(Ok(3), |seconds| seconds.parse())?;
    let mut config = TunConfig::new(link.parse()?, 1);
    let rtt = config.link.rtt();
    config.offload = arguments.next().as_deref() != Some("plain");
    let link = TunLink::start(config)?;
    for end in [link.near(), link.far()] {
        end.set_sysctl("net.ipv4.tcp_rmem", "4096 131072 134217728")?;
        end.set_sysctl("net.ipv4.tcp_wmem", "4096 131072 134217728")?;
    }
    let address = SocketAddr::new(link.far_address().into(), 0);
    let listener = link.far().run(|| TcpListener::bind(address))??;
    let address = listener.local_addr()?;
    let sink = std::thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        let mut received = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(received),
                length => received += length as u64,
            }
        }
    });
    let mut stream = link.near().run(|| TcpStream::connect(address))??;
    let start = Instant::now();
    let bytes = vec![1; 1 << 20];
    while start.elapsed() < Duration::from_secs(seconds) {
        stream.write_all(&bytes)?;
    }
    drop(stream);
    let received = sink.join().map_err(|_| "the sink panicked")??;
    let bits = received as f64 * 8.0 / start.elapsed().as_secs_f64();
    let stats = link.stop();
    println!("{:.3} Gbit/s of payload", bits / 1e9);
    println!("{:?}\n{:?}", stats.forward, stats.back);
    let late = stats.forward.lateness_mean();
    println!(
        "late by {late:?} on average; invalid: {:?}",
        stats.invalid(rtt)
    );
    Ok(())
}
