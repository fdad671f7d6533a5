package etcd

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// memory is what this process knows about the identity of the store. etcd with a wiped data directory comes
// up with the same cluster ID and says nothing; a watch from a revision that is now in the
// future waits in silence. Two things give it away: the namespace's random ID, which is
// gone or another, and the revision, which never goes back in a linearizable answer.
type memory struct {
	mu       sync.Mutex
	id       dchannel.ID // of the namespace; zero until known
	cluster  uint64
	revision int64  // the newest seen
	losses   uint64 // how often the revision went back under the same ID (a restored snapshot)
}

// mark is the state of memory when a request began.
type mark struct {
	revision int64
	losses   uint64
}

var errStateLost = errors.New("the server has lost its state")

func (m *memory) mark() mark {
	m.mu.Lock()
	defer m.mu.Unlock()
	return mark{m.revision, m.losses}
}

// observe takes the header of the answer to a request that began at k. Every answer passes here.
func (b *Backend) observe(k mark, h *pb.ResponseHeader) {
	m := &b.memory
	m.mu.Lock()
	lost := k.losses == m.losses && h.Revision < k.revision
	if lost {
		m.losses++
		m.revision = h.Revision
	} else if k.losses == m.losses {
		m.revision = max(m.revision, h.Revision)
	}
	m.mu.Unlock()
	if lost {
		b.forget(fmt.Errorf("%w: its revision went back from %d to %d", errStateLost, k.revision, h.Revision))
	}
}

// incarnation returns what stands for the store's memory, given the namespace's ID as just
// read. A known ID that has changed means that the state was lost.
func (b *Backend) incarnation(id dchannel.ID, h *pb.ResponseHeader) dchannel.ID {
	m := &b.memory
	m.mu.Lock()
	changed := m.id != dchannel.ID{} && (m.id != id || m.cluster != h.ClusterId)
	m.id, m.cluster = id, h.ClusterId
	text := append([]byte(nil), id[:]...)
	text = binary.BigEndian.AppendUint64(text, h.ClusterId)
	text = binary.BigEndian.AppendUint64(text, m.losses)
	m.mu.Unlock()
	if changed {
		b.forget(fmt.Errorf("%w: the namespace's id has changed", errStateLost))
	}
	sum := sha256.Sum256(text)
	return dchannel.ID(sum[:16])
}

// forget drops what was true of the store that is no more, and starts the watch anew.
func (b *Backend) forget(reason error) {
	b.log.Warn("etcd backend: " + reason.Error())
	b.leases.drop()
	b.tails.forget()
	if p := b.pushing(); p != nil {
		p.restartWatch(reason)
	}
}

// identify writes the namespace's ID if there is none, and puts it under a lease that lives on.
// The ID expires like everything else; whoever is alive renews it with each bookkeeping lease.
func (b *Backend) identify(ctx context.Context) error {
	lease, err := b.leases.get(ctx, b.opts.idle)
	if err != nil {
		return err
	}
	k := b.memory.mark()
	fresh := dchannel.NewID().String()
	resp, err := b.kv.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(b.keys.id), "=", 0)).
		Then(clientv3.OpPut(b.keys.id, fresh, clientv3.WithLease(lease))).
		// IgnoreValue: the lease changes, the ID stays whoever wrote it.
		Else(clientv3.OpPut(b.keys.id, "", clientv3.WithIgnoreValue(), clientv3.WithLease(lease))).
		Commit()
	if err != nil {
		return err
	}
	b.observe(k, resp.Header)
	b.renewed.Store(int64(lease))
	return nil
}

// renew keeps the namespace's ID alive: a no-op until the bookkeeping lease has changed.
func (b *Backend) renew(ctx context.Context) error {
	lease, err := b.leases.get(ctx, b.opts.idle)
	if err != nil || b.renewed.Load() == int64(lease) {
		return err
	}
	return b.identify(ctx)
}

// namespaceID reads the ID from the answer to a Get of its key; zero if there is none.
func namespaceID(r *pb.RangeResponse) (id dchannel.ID) {
	if len(r.Kvs) == 1 {
		entry.ParseID(&id, r.Kvs[0].Value)
	}
	return id
}
