//! Shows an image while its files are on their way. Only the leader knows how far they are, so only it serves this.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, time};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::Status;
use uncloud_proto::{ids::ImageId, v1};

use super::{context::Context, convert};
use crate::{leadership::Leader, model::image::ImageState, state::State};

/// How often it is looked at. Nobody reads faster.
const PERIOD: Duration = Duration::from_millis(250);

/// Sends the image whenever something changes, until nothing more is going to happen to it.
pub(super) fn watch(
    context: Context,
    leader: Arc<Leader>,
    image: ImageId,
) -> impl Stream<Item = Result<v1::WatchImageResponse, Status>> + Send + use<> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let work = async {
            let mut last = None;
            loop {
                let Some((now, state)) = leader.mirror.read(|s| look(&leader, s, image)) else { return };
                if last.as_ref() != Some(&now) {
                    last = Some(now.clone());
                    if sender.send(Ok(now)).await.is_err() {
                        return;
                    }
                }
                match state {
                    ImageState::Ready | ImageState::Failed => return,
                    ImageState::Fetching | ImageState::Uploading | ImageState::Deleting => time::sleep(PERIOD).await,
                }
            }
        };
        tokio::select! {
            biased;
            () = sender.closed() => {}
            () = leader.cancel.cancelled() => drop(sender.send(Err(context.term_ended())).await),
            () = work => {}
        }
    });
    ReceiverStream::new(receiver)
}

fn look(leader: &Leader, state: &State, image: ImageId) -> Option<(v1::WatchImageResponse, ImageState)> {
    let entry = state.image(image)?;
    let progress = leader.images.get(image).map(|live| v1::ImageProgress {
        done_bytes: live.done,
        total_bytes: live.total,
        host_name: live.host.and_then(|h| state.host(h)).map(|h| h.record.name.clone()).unwrap_or_default(),
        note: live.note,
    });
    let now = v1::WatchImageResponse { image: Some(convert::image(entry)), progress };
    Some((now, entry.record.state))
}
