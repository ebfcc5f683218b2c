//! `uncloud vm screenshot` and `uncloud vm vnc`: the screen of a guest.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use clap::Args;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use uncloud_proto::v1;

use super::super::{Context, Error, Signals};
use crate::{
    client::{Client, Vnc},
    output::{self, Format},
};

/// The largest picture that is taken; the server sends no larger ones.
const MAX_PICTURE: usize = 32 << 20;
/// Viewers at a time.
const MAX_VIEWERS: usize = 16;
/// How much is read from a viewer at once.
const CHUNK: usize = 16 << 10;

#[derive(Debug, Args)]
pub(crate) struct Screenshot {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// The PNG file to write; `-` for stdout. Without this, the VM's name with `.png`.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Listen {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// Where viewers connect, on this machine; port 0 takes any that is free. There is no password.
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
}

pub(crate) async fn screenshot(context: &Context, a: Screenshot) -> Result<(), Error> {
    let request = v1::ScreenshotRequest { vm: a.vm.clone(), owner: context.owner.clone() };
    let mut pieces = context.client.screenshot(request).await?;
    let mut picture = Vec::new();
    while let Some(piece) = pieces.message().await? {
        picture.extend_from_slice(&piece.data);
        if picture.len() > MAX_PICTURE {
            return Err(Error::Failed(format!("the picture has more than {MAX_PICTURE} bytes")));
        }
    }
    let file = a.file.unwrap_or_else(|| PathBuf::from(format!("{}.png", a.vm)));
    if file.as_os_str() == "-" {
        return Ok(output::print_raw(&picture)?);
    }
    let failed = |e| Error::Failed(format!("cannot write {}: {e}", file.display()));
    tokio::fs::write(&file, &picture).await.map_err(failed)?;
    match context.format {
        Format::Json => {
            let line = serde_json::json!({ "file": file.display().to_string(), "bytes": picture.len() });
            output::print(&line.to_string())?;
        }
        Format::Table => output::note(&format!("Wrote {} ({} bytes).", file.display(), picture.len())),
    }
    Ok(())
}

pub(crate) async fn vnc(context: &Context, a: Listen) -> Result<(), Error> {
    if !a.listen.ip().is_loopback() {
        return Err(Error::Usage(format!(
            "--listen {} would let anybody on the network at the guest's keyboard; listen on 127.0.0.1 or [::1], and \
             use a tunnel of your own (such as `ssh -L`) from elsewhere",
            a.listen
        )));
    }
    let open = v1::VncOpen { vm: a.vm, owner: context.owner.clone() };
    // Says now whether there is a screen, instead of when the first viewer comes.
    drop(first_words(&context.client, open.clone()).await?);
    let mut signals = Signals::take()?;
    let failed = |e| Error::Failed(format!("cannot listen on {}: {e}", a.listen));
    let listener = TcpListener::bind(a.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    match context.format {
        Format::Json => output::print(&serde_json::json!({ "address": address.to_string() }).to_string())?,
        Format::Table => output::print(&address.to_string())?,
    }
    output::note("Connect a VNC viewer there. Ctrl-C ends this; the VM goes on.");
    let viewers = Arc::new(Semaphore::new(MAX_VIEWERS));
    loop {
        let (viewer, _) = tokio::select! {
            biased;
            _ = signals.next() => return Ok(()),
            accepted = listener.accept() => accepted.map_err(failed)?,
        };
        let Ok(turn) = Arc::clone(&viewers).try_acquire_owned() else {
            output::note(&format!("{MAX_VIEWERS} viewers are connected already; another one was turned away."));
            continue;
        };
        let (client, open) = (context.client.clone(), open.clone());
        tokio::spawn(async move {
            let _turn = turn;
            if let Err(error) = carry(&client, open, viewer).await {
                error.report();
            }
        });
    }
}

/// Opens a connection and waits for the first that the server says, which is what tells that there is one.
async fn first_words(client: &Client, open: v1::VncOpen) -> Result<(Vnc, Vec<u8>), Error> {
    let mut vnc = client.vnc(open).await?;
    match vnc.output.message().await? {
        Some(first) => Ok((vnc, first.data)),
        None => Err(Error::Failed("the screen was closed: the VM does not run any more".to_owned())),
    }
}

/// Joins a viewer and the screen until either ends.
async fn carry(client: &Client, open: v1::VncOpen, viewer: TcpStream) -> Result<(), Error> {
    let (mut vnc, first) = first_words(client, open).await?;
    let (mut read, mut write) = viewer.into_split();
    let to_viewer = async {
        let mut piece = first;
        loop {
            if write.write_all(&piece).await.is_err() {
                return Ok(());
            }
            match vnc.output.message().await? {
                Some(next) => piece = next.data,
                None => return Ok(()),
            }
        }
    };
    let input = vnc.input;
    let from_viewer = async {
        let mut bytes = vec![0; CHUNK];
        while let Ok(n @ 1..) = read.read(&mut bytes).await {
            let message = v1::vnc_request::Message::Data(bytes[..n].to_vec());
            if input.send(v1::VncRequest { message: Some(message) }).await.is_err() {
                // The output says why.
                return std::future::pending().await;
            }
        }
    };
    tokio::select! {
        end = to_viewer => end,
        () = from_viewer => Ok(()),
    }
}
