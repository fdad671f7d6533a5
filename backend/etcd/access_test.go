package etcd_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/testserver"
)

// TestLeastPrivilege: the documented prefix is enough, and without it everything is refused.
func TestLeastPrivilege(t *testing.T) {
	url := server(t).URL()
	admin := connect(t, url)
	ctx := t.Context()
	do := func(_ any, err error) { require.NoError(t, err) }
	do(admin.RoleAdd(ctx, "app"))
	do(admin.RoleGrantPermission(ctx, "app", "dchannel/", clientv3.GetPrefixRangeEnd("dchannel/"), clientv3.PermissionType(clientv3.PermReadWrite)))
	do(admin.UserAdd(ctx, "app", "secret"))
	do(admin.UserGrantRole(ctx, "app", "app"))
	do(admin.UserAdd(ctx, "stranger", "secret"))
	do(admin.RoleAdd(ctx, "root"))
	do(admin.UserAdd(ctx, "root", "secret"))
	do(admin.UserGrantRole(ctx, "root", "root"))
	do(admin.AuthEnable(ctx))

	as := func(user string) *clientv3.Client {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, Username: user, Password: "secret"})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, c.Close()) })
		return c
	}
	b := backend(t, as("app"))
	k := subscribe(t, b, "a")
	publish(t, b, "a", "x")
	_, err := b.MarkClosed(ctx, "a", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	k.await(t, "pushes", k.count(2))
	require.Len(t, readAll(t, b, "a").Entries, 2)
	require.NoError(t, b.Remove(ctx, "a"))
	k.mu.Lock()
	require.Empty(t, k.resyncs)
	k.mu.Unlock()

	for name, c := range map[string]*clientv3.Client{"without permission": as("stranger"), "without a user": admin} {
		b := backend(t, c)
		_, err := b.Publish(ctx, "a", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrRefused, name)
		_, err = b.Heads(ctx, nil)
		require.ErrorIs(t, err, dchannel.ErrRefused, name)
		_, err = b.Read(ctx, "a", dchannel.Position{}, 1)
		require.ErrorIs(t, err, dchannel.ErrRefused, name)
		_, err = b.Subscribe(ctx, "a", newSink())
		require.ErrorIs(t, err, dchannel.ErrRefused, name)
		require.NotContains(t, err.Error(), "secret")
	}
}

func TestTLS(t *testing.T) {
	s := testserver.EtcdForTest(t, testserver.EtcdConfig{NoFsync: true, TLS: testserver.MutualTLS})
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.URL()}, TLS: s.TLS()})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	b := backend(t, c)
	k := subscribe(t, b, "a")
	publish(t, b, "a", "x")
	k.await(t, "push", k.count(1))
}

func TestFullDatabase(t *testing.T) {
	b := backend(t, connect(t, server(t, "--quota-backend-bytes=4194304").URL()), etcd.WithRetention(1, time.Hour))
	require.Eventually(t, func() bool {
		_, err := b.Publish(t.Context(), "a", frame(string(make([]byte, 1<<20))))
		if err != nil {
			require.ErrorIs(t, err, dchannel.ErrRefused)
		}
		return err != nil
	}, patience, time.Millisecond)
	readAll(t, b, "a") // reading goes on
}
