//! Measures what the relay carries on this machine, and how late: the figure that says which links
//! can be emulated here. `cargo run --release -p hybridmig-netem --example relay_throughput -- 300mbit`

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use hybridmig_netem::{LinkSpec, Relay, RelayConfig};

const LENGTH: Duration = Duration::from_secs(3);
const PAYLOAD: usize = 1452;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rate = std::env::args().nth(1).unwrap_or("300mbit".to_owned());
    let link: LinkSpec = format!("delay 25ms rate {rate} limit 50ms").parse()?;
    let bits = link.forward.rate.ok_or("a link with a rate is needed")? as f64;
    let target = UdpSocket::bind("127.0.0.1:0")?;
    target.set_read_timeout(Some(Duration::from_millis(100)))?;
    let relay = Relay::start(RelayConfig {
        listen: "127.0.0.1:0".parse()?,
        target: target.local_addr()?,
        link: link.clone(),
        seed: 1,
    })?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.connect(relay.local_addr())?;
    let start = Instant::now();
    let sink = std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        // Silence for as long as the time limit is the end.
        while target.recv(&mut buffer).is_ok() || start.elapsed() < LENGTH {}
    });
    let mut sent = 0u64;
    while start.elapsed() < LENGTH {
        // A little more than the link takes.
        let packets = start.elapsed().as_secs_f64() * bits * 1.05 / 8.0 / (PAYLOAD + 28) as f64;
        while sent < packets as u64 {
            client.send(&[1; PAYLOAD])?;
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    sink.join().map_err(|_| "the sink panicked")?;
    let stats = relay.stop().forward;
    // The queue drains for as long as it is deep after the last packet has come.
    let seconds = (LENGTH + link.forward.queue().unwrap_or_default()).as_secs_f64();
    println!(
        "{link}: {:.1} Mbit/s carried; late by {:?} on average, {:?} at worst\n{stats:?}",
        stats.delivered_bytes as f64 * 8.0 / seconds / 1e6,
        stats.lateness_mean(),
        stats.lateness_max,
    );
    Ok(())
}
