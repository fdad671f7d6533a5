package nats_test

import (
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/drivertest"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/locktest"
	"github.com/dchannel/dchannel/internal/testserver"
)

// openInChild connects in the processes that the proofs of the locks start.
func openInChild(addr string) (dchannel.Backend, error) {
	conn, err := natsgo.Connect("nats://"+addr, natsgo.MaxReconnects(-1))
	if err != nil {
		return nil, err
	}
	return nats.New(conn), nil
}

func TestLockProofStoppedHolders(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	lockproof.StoppedHolders(t, rig(server), 250*time.Millisecond, 12)
}

func TestLockProofKilledHolders(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	lockproof.KilledHolders(t, rig(server), 500*time.Millisecond, time.Millisecond, 6, false, 300*time.Millisecond)
}

func TestLockProofWakeUps(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	r := rig(server)
	lockproof.WakeUps(t, func() dchannel.Backend { return r.Connect(t, server.Addr()) }, 500, 100*time.Millisecond)
}

func TestLockProofTwoHundredContenders(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	lockproof.TwoHundredContenders(t, rig(server), map[string]float64{"wait": 10})
}

func TestLockProofLinearizable(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	r := rig(server)
	report := locktest.Check(t, func() dchannel.Backend { return r.Connect(t, server.Addr()) }, locktest.Config{For: 3 * time.Second, Late: 10 * time.Millisecond})
	require.Positive(t, report.Expiries)
}

func TestMutex(t *testing.T) {
	drivertest.Mutex(t, rig(testserver.NATSForTest(t, testserver.NATSConfig{})))
}
