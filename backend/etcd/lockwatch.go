package etcd

import (
	"bytes"
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
)

// lockPrefix is put before a channel's escaped name, in which there is no slash, to name the
// subscriptions to its lock.
const lockPrefix = "lock/"

// WatchLock adds the channel's lock to what the one watch of this backend is looked through for.
func (b *Backend) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	return b.subscribe(ctx, lockPrefix+escape(channel), hinter(hint))
}

// hinter is the sink of who waits for a lock.
type hinter func()

func (h hinter) Entry(dchannel.Entry) { h() }
func (h hinter) Resync(error)         { h() }

// State: an interruption is no news of the lock, and its end comes as a Resync. When all is over, so
// is the wait.
func (h hinter) State(s dchannel.State, _ error) {
	if s == dchannel.StateFailed {
		h()
	}
}

// hint tells those who watch the lock that ev is about. What matters is that the lock has changed hands,
// and that a place was lost, which may leave the next in line the first before a free lock.
func (p *push) hint(ev *clientv3.Event) {
	name, key, ok := bytes.Cut(ev.Kv.Key[len(p.b.keys.locks):], []byte{'/'})
	if !ok || string(key) != "hold" && (ev.Type == clientv3.EventTypePut || !bytes.HasPrefix(key, []byte("line/"))) {
		return
	}
	p.mu.Lock()
	subs := p.subs[lockPrefix+string(name)]
	p.mu.Unlock()
	for _, s := range subs {
		s.tell(func(k dchannel.Sink) { k.Entry(dchannel.Entry{}) })
	}
}
