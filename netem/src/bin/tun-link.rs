//! Joins two network namespaces by an emulated link until its input ends:
//! `cargo run --package hybridmig-netem --bin tun-link -- "delay 25ms rate 200mbit" [NAME]`.
//! With a NAME, `ip netns exec
//! hybridmig-NAME-near CMD` runs something in them; without, `nsenter --net=PATH CMD` does.

use std::io::Read;

use hybridmig_netem::namespace::remove_stale;
use hybridmig_netem::{TunConfig, TunLink};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let link = arguments.next().unwrap_or_else(|| "delay 25ms".to_owned());
    for name in remove_stale()? {
        println!("removed {name}");
    }
    let handle = TunLink::start(TunConfig::new(link.parse()?, 1))?;
    let mut names = Vec::new();
    if let Some(name) = arguments.next() {
        names.push(handle.near().name(&format!("{name}-near"))?);
        names.push(handle.far().name(&format!("{name}-far"))?);
    }
    println!("near {}", handle.near().path().display());
    println!("far {}", handle.far().path().display());
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(names);
    println!("{:#?}", handle.stop());
    Ok(())
}
